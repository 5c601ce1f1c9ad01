"""One module per benchmark, each with ``main(argv)``, and what they share in ``common``."""
