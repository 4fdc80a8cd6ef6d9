"""What may be read from files that somebody else could have written: owners of folders, and results without pickles."""
