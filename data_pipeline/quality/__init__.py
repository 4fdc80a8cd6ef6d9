"""Quality: rules for one scan, outliers of a cohort, the quality page."""
