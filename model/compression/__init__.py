"""MiniPuzzle: compress a hybrid model by cutting layers and FFN neurons, then distilling (paper section 3)."""
