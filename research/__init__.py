"""Scripts that make the numbers and pictures of results/ and docs/; nothing imports them."""
