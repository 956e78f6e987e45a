"""All pairs of two sets.

``msssim`` compares pictures by SSIM and MS-SSIM, ``matches`` finds each picture's best references,
``neighbours`` the nearest vectors among references that needn't fit into memory.
``python -m lethebench.pairs.speed`` measures the picture engine against a loop over pairs.
"""
