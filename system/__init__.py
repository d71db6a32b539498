"""What touches the machine: errors a user can fix, atomic files and folders, downloads, retries."""
