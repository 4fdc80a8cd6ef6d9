"""Cohorts: layouts, tables, declared columns, pseudonyms, splits."""
