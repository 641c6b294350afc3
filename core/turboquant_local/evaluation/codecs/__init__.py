"""Codecs behind one interface, so that they can be measured on the same tokens."""
