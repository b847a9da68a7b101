"""The laws of the house, checked on the source text: who imports whom, no hidden state, words and shapes, packaging."""
