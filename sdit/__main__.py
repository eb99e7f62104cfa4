import sys

if __name__ == "__main__":
    try:
        from .cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # before or after main, which has its own answer
        print("sdit: stopped", file=sys.stderr)
        sys.exit(130)
