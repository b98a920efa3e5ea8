"""The losses with the signatures of the papers' repositories: change an import line, keep the call."""
