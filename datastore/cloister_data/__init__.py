"""The small types and wire messages that both sides share. Imports nothing else of Cloister."""
