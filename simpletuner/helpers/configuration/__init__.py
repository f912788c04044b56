"""The user's files and command line, validated into one frozen RunConfig."""
