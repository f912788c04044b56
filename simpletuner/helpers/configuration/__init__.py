"""What the user wrote, validated into one frozen RunConfig."""
