//! The command line of Linux on GPU: parse, dispatch, report. One file per subcommand.

fn main() {}
