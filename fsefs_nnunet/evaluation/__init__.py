"""Metrics, tables, pictures and reports."""
