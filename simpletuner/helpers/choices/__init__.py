"""One record for each value of a choice in the configuration; everything else about it derives from it."""
