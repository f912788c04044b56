"""From the files and the command line to one checked RunConfig."""
