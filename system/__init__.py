"""What touches the machine: errors a user can mend, atomic files and folders, downloads, retries."""
