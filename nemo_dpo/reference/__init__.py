"""The reference policy's log-probs: one protocol, whatever holds the weights."""
