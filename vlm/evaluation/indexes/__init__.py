"""Approximate search compared with exact search."""
