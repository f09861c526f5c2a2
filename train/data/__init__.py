"""Data modules: text of one's own, of Python or of the hub, pictures, and the generated diagnostics of the field.

One file per source, so that a source pays only for what it imports. `core` has what all of them share.
"""
