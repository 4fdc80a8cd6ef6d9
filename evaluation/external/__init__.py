"""Features and encoders of others: tables of features, and Python objects that compute features from a cohort's files."""
