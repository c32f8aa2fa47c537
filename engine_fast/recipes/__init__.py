"""Whole runs: stages as data, done once for given inputs, resumable, from a corpus to a report."""
