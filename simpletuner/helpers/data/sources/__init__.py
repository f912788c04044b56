"""Places of images: folders, storage, tables and archives."""
