"""Foreign formats, a file each; what a file names in `FORMATS` is known to `zoo.load` and `zoo export`."""
