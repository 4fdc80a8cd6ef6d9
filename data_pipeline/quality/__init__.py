"""Quality: rules for single scans, outliers and duplicates, the survey and its page."""
