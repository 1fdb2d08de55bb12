"""One file per format: each turns files into `Split`s and knows nothing of names, folders or checksums."""
