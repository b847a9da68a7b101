// Every section of the guide, in its order, with the packages of this generation.
import * as sdk from './sdk.mjs';
import { register } from '../shared/migrated/all.mjs';

register(sdk);
