"""What a finished run leaves to other software: targets of export, one file each, and the command `cushion-export`."""
