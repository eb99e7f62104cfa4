import sys

if __name__ == "__main__":
    try:
        from .cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # raised before or after main, which handles its own
        print("sdit: stopped", file=sys.stderr)
        sys.exit(130)
