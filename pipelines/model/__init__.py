"""The encoder-decoder, its straight-through layers and its losses."""
