"""Metrics: one folder or file each. A module whose name begins with an underscore is shared code."""
