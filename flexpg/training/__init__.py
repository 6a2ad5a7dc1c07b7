"""What the recipes need besides the method; imported by recipes."""
