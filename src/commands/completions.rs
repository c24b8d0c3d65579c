//! `temper completions` and `temper man`: files for shells and for `man`, generated from the command line's definition.

use std::path::Path;

use clap_complete::Shell;
use engine::error::{At, Error};

use super::Done;
use crate::args;

pub fn completions(shell: Shell) -> Done {
    let mut script = Vec::new();
    let mut command = args::public();
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut script);
    put!("{}", String::from_utf8_lossy(&script));
    Ok(0)
}

pub fn man(folder: Option<&Path>) -> Done {
    let Some(folder) = folder else {
        let mut page = Vec::new();
        clap_mangen::Man::new(args::public()).render(&mut page).at("the manual page")?;
        put!("{}", String::from_utf8_lossy(&page));
        return Ok(0);
    };
    if folder.exists() && !folder.is_dir() {
        return Err(Error::yours(format!("{}: this is no folder", folder.display())).into());
    }
    std::fs::create_dir_all(folder).at(folder)?;
    clap_mangen::generate_to(args::public(), folder).at(folder)?;
    say!("wrote the manual pages to {}", folder.display());
    Ok(0)
}
