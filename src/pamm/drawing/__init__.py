"""Laying out pictures, tables and pages."""
