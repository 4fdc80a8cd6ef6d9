"""Reading shards: the manifest and single scans, local or remote."""
