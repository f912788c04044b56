"""Files: storage, atomic writes, optional imports, logs."""
