"""Factors, GGN columns and gradient in one sweep of activation-only backward passes."""
