"""Operations: of each a plain reference, the faster implementations, and the choice between them."""
