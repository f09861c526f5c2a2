"""What all data share: the module and its position, loaders, corpora of tokens, planned batches."""
