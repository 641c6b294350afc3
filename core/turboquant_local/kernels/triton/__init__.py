"""The operations in Triton, one file each. Importing this package imports no Triton; its files do."""
