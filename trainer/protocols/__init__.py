"""Published ways to judge features, one file each, beside its definition: numbers in, figures out."""
