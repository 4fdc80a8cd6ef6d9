"""Cohorts: layouts, tables, declared columns, splits."""
