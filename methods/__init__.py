"""Mitigation methods: one file or folder each, found by their place here."""
