//! `temper completions` and `temper man`: files for shells and for `man`, generated from the command line's definition.

use std::path::Path;

use clap_complete::Shell;
use engine::error::{AtPath, Error};

use super::CommandResult;
use crate::args;

pub fn completions(shell: Shell) -> CommandResult {
    let mut script = Vec::new();
    let mut command = args::public_command();
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut script);
    out!("{}", String::from_utf8_lossy(&script));
    Ok(0)
}

pub fn man(folder: Option<&Path>) -> CommandResult {
    let Some(folder) = folder else {
        let mut page = Vec::new();
        clap_mangen::Man::new(args::public_command()).render(&mut page).at("the manual page")?;
        out!("{}", String::from_utf8_lossy(&page));
        return Ok(0);
    };
    if folder.exists() && !folder.is_dir() {
        return Err(Error::user(format!("{}: not a folder", folder.display())).into());
    }
    std::fs::create_dir_all(folder).at(folder)?;
    clap_mangen::generate_to(args::public_command(), folder).at(folder)?;
    outln!("wrote the manual pages to {}", folder.display());
    Ok(0)
}
