"""The losses with the signatures of the papers' repositories.

``install()`` of a module puts its functions into an importable checkout, whose files define the losses where they use
them; or import them in the place of those definitions.
"""
