"""Images of what a flow has learned."""
