"""What survives a restart: the database, the packed masks and the spool."""
