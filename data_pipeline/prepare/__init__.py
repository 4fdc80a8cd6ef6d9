"""Raw scans become the volumes that shards take: bias field, brain, registration, tissues, figures, quality page."""
