"""How values and strangers' words are shown; a leaf, which all packages may import."""
