"""The commands of `lora`: for each its arguments, and one library call whose result is printed."""
