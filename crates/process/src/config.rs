//! Where a process's settings come from: flag, then environment, then configuration file, then default.
//!
//! The file is TOML; its keys are the long flags without dashes in front. What it says becomes the default of the flag before
//! the command line is read, so every check that holds for a flag holds for the file.

use std::ffi::OsString;
use std::path::Path;

use clap::{Arg, ArgAction, Command, Parser};
use toml::{Table, Value};

/// Reads the settings of this process. Prints what is wrong and exits with status 2 when they are not valid.
pub fn parse<T: Parser>() -> T {
    from(std::env::args_os()).unwrap_or_else(|error| error.exit())
}

/// Reads settings from `args` (the program's name first), the environment, and the file that `--config` names.
pub fn from<T: Parser>(args: impl IntoIterator<Item = OsString>) -> Result<T, clap::Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    let mut command = T::command();
    if let Some(path) = config_path(&args) {
        command = with_file(command, Path::new(&path))?;
    }
    T::from_arg_matches(&command.try_get_matches_from(args)?)
}

/// The value of `--config`, before anything else is read.
fn config_path(args: &[OsString]) -> Option<OsString> {
    let mut args = args.iter().skip(1);
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy();
        if text == "--config" {
            return args.next().cloned();
        }
        if let Some(path) = text.strip_prefix("--config=") {
            return Some(path.into());
        }
        if text == "--" {
            break;
        }
    }
    std::env::var_os("SIROCCO_CONFIG")
}

fn with_file(command: Command, path: &Path) -> Result<Command, clap::Error> {
    let refuse = |problem: String| {
        let message = format!("configuration file {}: {problem}\n", path.display());
        clap::Error::raw(clap::error::ErrorKind::InvalidValue, message)
    };
    let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
    let table: Table = text.parse().map_err(|error: toml::de::Error| refuse(error.to_string()))?;
    with_table(command, table).map_err(refuse)
}

/// Makes what `table` says the defaults of `command`; a table in it is for the subcommand of its name.
fn with_table(mut command: Command, table: Table) -> Result<Command, String> {
    for (key, value) in table {
        let flag = key.replace('_', "-");
        if command.find_subcommand(&flag).is_some() {
            let Value::Table(table) = value else {
                return Err(format!("{key:?} is a single value, must be a table of that command's flags"));
            };
            let subcommand = command.find_subcommand(&flag).expect("it was just found").clone();
            let subcommand = with_table(subcommand, table)?;
            command = command.mut_subcommand(&flag, |_| subcommand);
            continue;
        }
        let known: Vec<&str> =
            command.get_arguments().filter_map(Arg::get_long).filter(|name| *name != "config").collect();
        let Some(arg) = command.get_arguments().find(|arg| arg.get_long() == Some(flag.as_str())) else {
            return Err(format!("unknown key {key:?}, known are: {}", known.join(", ")));
        };
        let (id, values) = (arg.get_id().clone(), checked(arg, &flag, &value)?);
        command = command.mut_arg(id, |arg| arg.required(false).default_values(values));
    }
    Ok(command)
}

/// What `value` is on the command line for `arg`, whose long flag is `flag`: refused here, so that the message names the file.
fn checked(arg: &Arg, flag: &str, value: &Value) -> Result<Vec<String>, String> {
    let kind = value.type_str();
    let values = texts(value).ok_or_else(|| format!("{flag:?} is a table, must be a single value"))?;
    match arg.get_action() {
        ArgAction::SetTrue | ArgAction::SetFalse if value.is_bool() => return Ok(values),
        ArgAction::SetTrue | ArgAction::SetFalse => {
            return Err(format!("{flag:?} is of type {kind}, must be true or false"));
        }
        ArgAction::Append => {}
        _ if value.is_array() => return Err(format!("{flag:?} is a list of {}, must be a single value", values.len())),
        _ => {}
    }
    let probe = Arg::new("value").long(flag.to_owned()).value_name(flag.to_ascii_uppercase()).num_args(1);
    let probe = probe.action(ArgAction::Append).value_delimiter(arg.get_value_delimiter());
    let probe = probe.value_parser(arg.get_value_parser().clone());
    let flags = values.iter().map(|value| format!("--{flag}={value}"));
    let outcome = Command::new("").no_binary_name(true).arg(probe).try_get_matches_from(flags);
    outcome.map(|_| values).map_err(|error| {
        // The rest of clap's message points to `--help` of a command that is not there.
        let message = error.to_string();
        let problem = message.split("\n\n").next().unwrap_or(&message);
        problem.trim_start_matches("error: ").replace("\n ", "")
    })
}

/// A value as it would stand on the command line; none when it cannot.
fn texts(value: &Value) -> Option<Vec<String>> {
    Some(match value {
        Value::String(text) => vec![text.clone()],
        Value::Integer(number) => vec![number.to_string()],
        Value::Float(number) => vec![number.to_string()],
        Value::Boolean(flag) => vec![flag.to_string()],
        Value::Datetime(time) => vec![time.to_string()],
        Value::Array(values) => values.iter().map(texts).collect::<Option<Vec<_>>>()?.concat(),
        Value::Table(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[derive(Parser, Debug)]
    struct Settings {
        #[arg(long)]
        config: Option<std::path::PathBuf>,
        #[arg(long, default_value_t = 1)]
        threads: usize,
        // Cargo sets this variable for every test, to the package's name.
        #[arg(long, env = "CARGO_PKG_NAME")]
        zone: Option<String>,
        #[arg(long, required = true)]
        model: String,
        #[arg(long, value_delimiter = ',')]
        etcd: Vec<String>,
        #[arg(long)]
        quiet: bool,
    }

    fn read(file: &str, flags: &[&str]) -> Result<Settings, String> {
        let mut config = tempfile::NamedTempFile::new().unwrap();
        config.write_all(file.as_bytes()).unwrap();
        let path = config.path().as_os_str().to_owned();
        let args = ["test".into(), "--config".into(), path].into_iter().chain(flags.iter().map(Into::into));
        from(args).map_err(|error| error.to_string())
    }

    #[test]
    fn a_flag_beats_the_file_and_the_file_beats_the_default() {
        let settings = read("threads = 3\nmodel = \"m\"\netcd = [\"a\", \"b\"]", &[]).unwrap();
        assert_eq!((settings.threads, settings.model.as_str()), (3, "m"));
        assert_eq!(settings.etcd, ["a", "b"]);
        assert_eq!(read("threads = 3\nmodel = \"m\"", &["--threads", "4"]).unwrap().threads, 4);
        assert_eq!(read("model = \"m\"", &[]).unwrap().threads, 1);
        assert!(settings.config.is_some());
    }

    #[test]
    fn a_flag_beats_the_environment_and_the_environment_beats_the_file() {
        let file = "model = \"m\"\nzone = \"from-file\"";
        assert_eq!(read(file, &[]).unwrap().zone.as_deref(), Some("sirocco-process"));
        assert_eq!(read(file, &["--zone", "from-flag"]).unwrap().zone.as_deref(), Some("from-flag"));
    }

    #[test]
    fn a_switch_can_be_set_in_the_file_and_still_be_given_as_a_flag() {
        for (file, flags, expected) in [
            ("quiet = true", [].as_slice(), true),
            ("quiet = false", &[], false),
            ("quiet = false", &["--quiet"], true),
            ("quiet = true", &["--quiet"], true),
        ] {
            let settings = read(&format!("model = \"m\"\n{file}"), flags).unwrap();
            assert_eq!(settings.quiet, expected, "{file} {flags:?}");
        }
    }

    #[test]
    fn a_bad_file_is_refused_by_name() {
        let cases = [
            ("model = \"m\"\nthread = 3", "unknown key \"thread\", known are: "),
            ("model = \"m\"\nthreads = \"many\"", "invalid value 'many' for '--threads <THREADS>': invalid digit"),
            ("model = ", "configuration file"),
            ("[model]\na = 1", "\"model\" is a table"),
            ("model = [\"a\", \"b\"]", "\"model\" is a list of 2"),
            ("model = []", "\"model\" is a list of 0"),
            ("model = \"m\"\nquiet = 3", "\"quiet\" is of type integer, must be true or false"),
            ("model = \"m\"\nquiet = \"loud\"", "\"quiet\" is of type string, must be true or false"),
            ("model = \"m\"\nthreads = true", "invalid value 'true' for '--threads <THREADS>'"),
            ("model = \"m\"\nthreads = 1.5", "invalid value '1.5' for '--threads <THREADS>'"),
        ];
        for (file, problem) in cases {
            let error = read(file, &[]).unwrap_err();
            assert!(error.contains("configuration file") && error.contains(problem), "{error}");
        }
        let absent = from::<Settings>(["test", "--config", "/nonexistent/file"].map(Into::into)).unwrap_err();
        assert!(absent.to_string().contains("/nonexistent/file"));
    }
}
