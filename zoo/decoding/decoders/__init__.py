"""Decoders, a file each: found by their folder, named by `@register_decoder`."""
