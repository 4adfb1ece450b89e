"""Where batches come from: files, folders and their formats."""
